"""Attention maps and features of a network: measured, drawn, shown on a page."""
