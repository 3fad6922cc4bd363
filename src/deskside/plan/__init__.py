"""Decides which tensor goes on which device, and predicts the speed."""

from deskside.plan.plan import DoesNotFit, Options, Plan, Usage
from deskside.plan.search import make_plan

__all__ = ["DoesNotFit", "Options", "Plan", "Usage", "make_plan"]
