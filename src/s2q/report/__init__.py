"""Reports: videos and contact sheets as files, and one self-contained page that shows a comparison."""

from s2q.report.compare_page import Scene, render_compare_page, scene_sheet
from s2q.report.page import PageContent, PlayerPair, render_page, write_page
from s2q.report.video import BT601, contact_sheet, encode_mp4, write_mp4

__all__ = [
    "BT601",
    "PageContent",
    "PlayerPair",
    "Scene",
    "contact_sheet",
    "encode_mp4",
    "render_compare_page",
    "render_page",
    "scene_sheet",
    "write_mp4",
    "write_page",
]
