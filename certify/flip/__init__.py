"""FLIP's theory (Zhang et al., ICLR 2023, section 4): loss bounds, trigger-recovery radius, counts of rejection."""
