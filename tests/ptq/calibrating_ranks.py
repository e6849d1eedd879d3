"""Two processes calibrate, each on half of the batches: both come to what one process finds on all of them."""

import torch
import torch.distributed as dist
from oneshot_models import batches, trained

from hf_compress import QuantizationConfig, TargetError, TrainingError, calibrate, calibration_config
from hf_compress.callbacks.ranks import elementwise

SETTINGS = (
    {"scheme": "int8_static", "inputs": {"observer": "mse"}},
    {"scheme": "int8_static", "weights": {"num_bits": 4}, "options": {"rounding": "gptq", "bias_correction": True}},
)


def main() -> None:
    data = batches(4)
    configs = [QuantizationConfig(method="ptq", **settings) for settings in SETTINGS]
    expected = []
    for config in configs:
        whole = trained("bert")
        calibrate(whole, data, config)
        expected.append(calibration_config(whole))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for config, wanted in zip(configs, expected, strict=True):
        model = trained("bert")
        calibrate(model, data[rank::2], config)
        found = calibration_config(model)
        for name, layer in wanted["layers"].items():
            for role in ("weights", "inputs"):
                ours, theirs = (torch.tensor(each[role]["scale"]) for each in (found["layers"][name], layer))
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
                assert torch.equal(elementwise(ours, "max"), elementwise(ours, "min"))
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        assert torch.equal(elementwise(weights, "max"), elementwise(weights, "min"))

        broken = [{"input_ids": torch.full((1, 4), 999)}] if rank == 1 else data
        try:
            calibrate(trained("bert"), broken, config)
        except (TargetError, TrainingError) as error:
            assert ("rank 1 failed" in str(error)) == (rank == 0), error
        else:
            raise AssertionError("nothing was raised")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
