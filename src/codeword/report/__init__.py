"""Reports: `measure` takes facts off a file, everything else here only draws them."""

from codeword.report.measure import Difference, Report, TensorReport, inspect, verify

__all__ = ["Difference", "Report", "TensorReport", "inspect", "verify"]
