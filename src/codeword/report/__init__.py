"""Reports: `measure` takes facts off a file, everything else here only draws them."""

from codeword.report.front import write_front
from codeword.report.measure import Difference, Report, TensorReport, inspect, verify
from codeword.report.page import Accuracy, Page, need_pictures, write_report

__all__ = [
    "Accuracy",
    "Difference",
    "Page",
    "Report",
    "TensorReport",
    "inspect",
    "need_pictures",
    "verify",
    "write_front",
    "write_report",
]
