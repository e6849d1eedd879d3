"""ONNX Runtime computes what was simulated, with integer kernels, for other sizes of batches and texts, too."""

from collections import Counter

import pytest
import tiny_models
import torch
from quantized_models import quantized

from hf_compress import ExportError, export_quantized, make_example_inputs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def one_layer():
    return tiny_models.bert(num_hidden_layers=1)


def run(folder, model, **sizes) -> tuple[torch.Tensor, torch.Tensor, Counter]:
    """Logits of ONNX Runtime and of the model, and the operators that ran."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    inputs = make_example_inputs(model, **sizes)
    given = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    (found,) = session.run(["logits"], given)
    operators = Counter(node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node)
    with torch.no_grad():
        return torch.from_numpy(found), model.eval()(**inputs).logits, operators


CASES = [
    (one_layer, "int8_static", "MatMulIntegerToFloat"),
    *(
        pytest.param(make, case, operator, marks=pytest.mark.slow)
        for make, case, operator in (
            (one_layer, "int8_dynamic", "MatMulInteger"),
            (one_layer, "int8_weight_only", None),
            (one_layer, "int4_weight_only", None),
            (one_layer, "outputs", "MatMulIntegerToFloat"),
            (one_layer, "lsq", "MatMulInteger"),
            (one_layer, "lsq_static", "MatMulIntegerToFloat"),
            (tiny_models.gpt2, "int8_dynamic", "MatMulInteger"),
            (tiny_models.llama, "int8_static", "MatMulIntegerToFloat"),
            (tiny_models.t5, "int8_static", "MatMulIntegerToFloat"),
            (tiny_models.vit, "int8_static", "MatMulIntegerToFloat"),
        )
    ),
]


@pytest.mark.parametrize(("make", "case", "operator"), CASES)
def test_runs_with_integer_kernels_and_equals_the_simulation(make, case, operator, tmp_path) -> None:
    model = make()
    found = quantized(model, case)
    export_quantized(model, tmp_path / "out", "onnx", verify=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    real, simulated, operators = run(tmp_path / "out", model, batch_size=3, length=7)
    error = (real - simulated).pow(2).mean().sqrt() / simulated.pow(2).mean().sqrt()
    assert error < (0.03 if case in ("int8_dynamic", "lsq") else 1e-4)  # ties of each token's lowest value
    assert operator is None or operators[operator] > 0
    stored = [
        torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
        for each in onnx.load(str(tmp_path / "out" / "model.onnx")).graph.initializer
    ]
    for layer in found.layers if make is one_layer else ():
        scale, _ = layer.weights.parameters(layer.module.weight)
        assert any(each.numel() == scale.numel() and _holds(each, scale) for each in stored), layer.name


def _holds(stored: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether a tensor is a scale, of groups laid out the other way round."""
    if stored.dtype != scale.dtype:
        return False
    return torch.equal(stored.flatten(), scale) or torch.equal(stored.t().flatten(), scale)


def test_what_cannot_be_stored(tmp_path) -> None:
    model = tiny_models.bert().to(torch.bfloat16)
    with pytest.raises(
        ExportError, match=r"torch\.bfloat16.*Formats that can: 'torchao', 'compressed-tensors', 'dense'"
    ):
        export_quantized(model, tmp_path / "out", "onnx", verify=False)
