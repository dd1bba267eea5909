"""Studies: variants of a recipe, trained with several seeds, that answer a question about pretraining.

Each folder holds a study.toml. `unmask study run NAME` repeats it on any text.
"""

from unmask.checks.studies.run import PLOT, RESULT, TABLE, run_study
from unmask.checks.studies.settings import Study, load_study, shipped_studies

__all__ = ["PLOT", "RESULT", "TABLE", "Study", "load_study", "run_study", "shipped_studies"]
