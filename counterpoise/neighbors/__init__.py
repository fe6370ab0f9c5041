"""Nearest neighbours, exact by torch in tiles or by FAISS where that is worth it; their votes and graphs; k-means."""

from counterpoise.neighbors.exact import nearest_neighbors
from counterpoise.neighbors.index import NeighborIndex
from counterpoise.neighbors.k_means import KMeans
from counterpoise.neighbors.knn import KNNClassifier, knn_graph

__all__ = ["KMeans", "KNNClassifier", "NeighborIndex", "knn_graph", "nearest_neighbors"]
