"""The loop's side: what is due is copied out of the live objects and committed while training goes on."""
