"""Collect what a test found about clients and routes, draw it, and write it to one page."""
