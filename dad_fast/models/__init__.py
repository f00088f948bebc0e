"""Teachers, students and discretizers: each takes pixels in [0,1] and owns its normalisation."""
