"""Two students of one teacher: as adapters on its network, or as networks of their own."""

from icd_lightning.models.students.base import DIRECTIONS, Role, Students
from icd_lightning.models.students.full import FullStudents
from icd_lightning.models.students.lora import ADAPTERS, LoraSettings, LoraStudents

__all__ = ["ADAPTERS", "DIRECTIONS", "FullStudents", "LoraSettings", "LoraStudents", "Role", "Students"]
