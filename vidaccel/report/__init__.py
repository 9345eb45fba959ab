"""What people look at: contact sheets, tables, heat-maps, sentences."""

from __future__ import annotations

from .clips import Clip, clip_of
from .heatmap import check_heatmap_path, draw_heatmap
from .page import check_page_path, render_page, write_page
from .plans import describe_patterns, heatmap_panels, plan_facts, rule_row, shown_extent
from .sheets import Strip, contact_sheet, strip_of, write_png
from .tables import comparison_table, demo_table, seconds_table
from .words import conclusions

__all__ = [
    "Clip",
    "Strip",
    "check_heatmap_path",
    "check_page_path",
    "clip_of",
    "comparison_table",
    "conclusions",
    "contact_sheet",
    "demo_table",
    "describe_patterns",
    "draw_heatmap",
    "heatmap_panels",
    "plan_facts",
    "render_page",
    "rule_row",
    "seconds_table",
    "shown_extent",
    "strip_of",
    "write_page",
    "write_png",
]
