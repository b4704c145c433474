"""Pictures of a shard for people: a page to turn the patient in, an orbit, a contact sheet."""

from drrgen.view.orbit import gif, mp4
from drrgen.view.page import html
from drrgen.view.sheet import sheet

__all__ = ["gif", "html", "mp4", "sheet"]
