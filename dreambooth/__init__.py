"""DreamBooth as a measured experiment: fine-tune on one subject, and say what was learned and what was lost."""

__version__ = "0.1.0"
