"""Run folders -> a report: one HTML page that needs nothing beside it, and Markdown. `page` is the way in; `data` says what is read."""
