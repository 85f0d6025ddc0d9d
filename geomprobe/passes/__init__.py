"""What a pass does: record, replay, be cut off, go on, be sealed."""
