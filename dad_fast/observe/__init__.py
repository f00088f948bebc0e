"""What a run shows and leaves behind: logs, progress, image sheets, reports."""
