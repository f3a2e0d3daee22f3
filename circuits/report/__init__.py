"""One self-contained HTML page that tells what a run found."""

from circuits.report.page import write_report
