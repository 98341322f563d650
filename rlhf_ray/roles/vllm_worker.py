"""What runs in each of an engine's processes: taking in new weights.

Named to vLLM as `worker_extension_cls` and called by name, so that no code has to be sent. vLLM's own weight transfer
engines load what they receive without showing it to anybody, and so leave nothing to take a hash of.
"""

from pathlib import Path
from typing import Any, cast

from torch import nn

from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.parcels import Parcel, Receiver


class WeightsWorker:
    """Adds `load_parcel` to vLLM's worker."""

    _intake: Intake | None = None
    _loading = False

    def load_parcel(self, parcel: Parcel, receiver: str) -> str | None:
        """Loads a parcel's weights in place; with the last one, the sha256 of all that this process received.

        A layer is put together once all of its weights are there, and takes the place of the old one then.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        worker = cast("Any", self)
        model, config = worker.model_runner.get_model(), worker.vllm_config.model_config
        if self._intake is None:
            self._intake = Intake(Receiver(receiver, worker.rank, worker.device), base=Path(config.model))
        with set_current_vllm_config(worker.vllm_config):
            if parcel.number == 0:
                if self._loading:  # a hand-over that broke off
                    finalize_layerwise_reload(model, config)
                forget_packed_experts(model)
                initialize_layerwise_reload(model)
                self._loading = True
            model.load_weights(self._intake.take(parcel))
            if not parcel.last:
                return None
            finalize_layerwise_reload(model, config)
            self._loading = False
        return self._intake.sha256()


def forget_packed_experts(model: nn.Module) -> None:
    """To be called before weights are replaced.

    On CPU vLLM 0.32 packs a mixture's experts for its kernel when they are loaded first and never again, so that new
    ones are read as what they are not. Without a kernel it makes one, and packs.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and next(module.parameters()).device.type == "cpu":
            method.moe_kernel = None
