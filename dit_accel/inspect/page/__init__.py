"""The report as one HTML file that needs no network and no scripts."""

from .document import report_page

__all__ = ["report_page"]
