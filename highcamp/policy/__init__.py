"""Decisions: what is best, when a checkpoint is due, which ones stay. Pure functions over facts: no I/O, no clock."""

from __future__ import annotations

from highcamp.policy.cadence import Every
from highcamp.policy.candidate import Candidate
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import Keep, Plan, plan

__all__ = ["Candidate", "Every", "Keep", "Monitor", "Plan", "plan"]
