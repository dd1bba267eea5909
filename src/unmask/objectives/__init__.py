"""What is hidden, what is asked, what it costs."""
