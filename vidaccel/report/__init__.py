"""What people look at: contact sheets, tables, heat-maps, sentences."""

from __future__ import annotations

from .heatmap import draw_heatmap
from .plans import describe_patterns, heatmap_panels, plan_facts, rule_row, shown_extent
from .sheets import Strip, contact_sheet, strip_of, write_png
from .tables import comparison_table, demo_table, seconds_table
from .words import conclusions

__all__ = [
    "Strip",
    "comparison_table",
    "conclusions",
    "contact_sheet",
    "demo_table",
    "describe_patterns",
    "draw_heatmap",
    "heatmap_panels",
    "plan_facts",
    "rule_row",
    "seconds_table",
    "shown_extent",
    "strip_of",
    "write_png",
]
