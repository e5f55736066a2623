"""The check before a run: what is wrong with pictures and captions, and what the model will see of them."""

from sdlora.data.check.checking import Report, check_data
from sdlora.data.check.findings import KINDS, Finding, Kind
from sdlora.data.check.page import write_page
from sdlora.data.check.report import report_json, report_text
from sdlora.data.check.sheet import write_sheets

__all__ = [
    "KINDS",
    "Finding",
    "Kind",
    "Report",
    "check_data",
    "report_json",
    "report_text",
    "write_page",
    "write_sheets",
]
