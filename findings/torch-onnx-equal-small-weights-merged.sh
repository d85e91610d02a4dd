#!/usr/bin/env bash
# torch.onnx.export merges weights of equal values if they are small, and leaves large ones apart.
#
# Versions:  torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnx-ir 1.1.0, 2026-11-30
# Guess:     the graph has one initializer for each parameter of the module. Parameters that are one tensor may be merged,
#            parameters that merely hold the same numbers are not: they are two weights, and may be trained apart.
# Behaviour: initializers of up to 1,024 elements are merged by value, with optimize=True, which is the default. In a
#            stack whose later layers are copies, their norms' weights and their biases are gone from the file while
#            their matrices stay, so a tool that puts trained weights into the graph by name misses some, or changes two
#            layers by one. optimize=False keeps all.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0 numpy
env/bin/python - 2> err <<'PY' | tee seen
import torch


def exported(width, optimize):
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, width)) for _ in range(4)]
    for layer in layers:
        torch.nn.init.normal_(layer[0].weight)
    for number in (2, 3):
        layers[number].load_state_dict(layers[number - 2].state_dict())
    stack = torch.nn.Sequential(*layers)
    program = torch.onnx.export(stack, (torch.randn(1, width),), dynamo=True, optimize=optimize, verbose=False)
    names = set(program.model.graph.initializers)
    return sorted(name for name, _ in stack.named_parameters() if name not in names)


print("width 1024:", *exported(1024, True))
print("width 1025:", *exported(1025, True))
print("width 1024, optimize=False:", *exported(1024, False))
PY
diff seen - <<'EXPECTED'
width 1024: 2.0.weight 2.1.bias 3.0.weight 3.1.bias
width 1025:
width 1024, optimize=False:
EXPECTED
echo "as described"
