"""Pure statistics of scores: intervals, paired comparisons of arms, correlations, and where the scatter comes from."""
