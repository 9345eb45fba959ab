"""The k-means kernels' cases of the interpreter, executed as PTX."""

from tests.kernels.triton.interpreter.test_kmeans import (
    test_centroids_of_any_strides_and_part_of_the_tokens,
    test_clusters,
    test_means,
    test_nan_has_a_label_too,
    test_nearest_centroid,
    test_the_first_of_equals_is_taken,
)

ARCHES = (80, 90, 120)
REPRESENTATIVE = (90,)
