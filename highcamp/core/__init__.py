"""Facts: frozen values of the library; no file is opened here, no clock read and no framework imported."""
