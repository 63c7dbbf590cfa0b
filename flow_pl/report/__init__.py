"""What a test found out about clients and routes: collected, drawn, and put on one page."""
