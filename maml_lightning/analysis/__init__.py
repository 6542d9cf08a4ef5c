"""What people look at: contact sheets, tables of predictions, comparisons of runs."""
