"""What a sweep found, for people: a table in the terminal and one HTML page that opens offline.

`reading` looks things up in a result, `curves` turns its trials and history into the numbers of the charts,
`charts` draws them, `tables` writes for the terminal, and `page` puts the HTML page together from
`report.html.jinja`, `report.css` and `report.js`.
"""

from fallline.reports.page import html, write_report
from fallline.reports.tables import ranking_table, summary

__all__ = ["html", "ranking_table", "summary", "write_report"]
