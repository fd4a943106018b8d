"""What people see of runs: their pages, comparisons and lists, made from run directories without importing torch."""

from .comparison import comparison_page
from .page import run_page
from .plotly_script import plotly_script
from .run import Run, RunNotFoundError, runs_in

__all__ = ["Run", "RunNotFoundError", "comparison_page", "plotly_script", "run_page", "runs_in"]
