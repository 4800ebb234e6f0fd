"""What is optimised. `config.objectives.OBJECTIVES` names the functions that build these."""

from raytune_ft.model.objectives.base import Columns, Forward, Objective, Teacher, TeacherOf
from raytune_ft.model.objectives.tokens import TokenObjective

__all__ = ["Columns", "Forward", "Objective", "Teacher", "TeacherOf", "TokenObjective"]
