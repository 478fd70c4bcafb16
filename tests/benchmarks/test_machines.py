"""benchmarks/machines.py: which presets fit on which machines."""

from benchmarks.machines import CLUSTERS, throughput_bound
from model.config import PRESETS, ModelConfig


def test_small_models_fit_every_cluster_and_3b_does_not():
    for preset in ("small", "base", "mindllm-1.3b"):
        for cluster in CLUSTERS:
            bound = throughput_bound(ModelConfig(**PRESETS[preset]), cluster, 2**19, 0.4)
            assert bound.fits and bound.memory <= cluster.gpu.memory * 1e9
    assert not throughput_bound(ModelConfig(**PRESETS["xiangxin-3b"]), CLUSTERS[0], 2**19, 0.4).fits
