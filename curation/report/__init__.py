"""The funnel's last word: one self-contained ``report.html``, opened from disk without a network.

``charts`` counts the score columns, ``issues`` the quality model's verdicts, ``actions`` the labels; ``tiers`` draws the
funnel, ``gallery`` picks the clips to show and ``words`` what is written about them, ``summary`` puts the totals into
words and rows, and ``render`` fills the templates and writes the file. Nothing here imports Ray or decodes video.
"""

from curation.report.render import write_report

__all__ = ["write_report"]
