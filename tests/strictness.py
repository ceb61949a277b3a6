"""Warnings are errors, in the process that runs the tests and in those that it starts."""

import warnings

import torch

# Other people's, which a test cannot avoid: how the message begins, and why it is no error.
FOREIGN_WARNINGS: dict[str, type[Warning]] = {
    # Torch 2.11, as inductor is first imported: for compiled blocks, FlexAttention, and by DeepSpeed.
    "`torch.jit.script_method` is deprecated": DeprecationWarning,
    # Dynamo looks at it while it traces with gradients, and hides the warning but from filters that make it an error.
    "The .grad attribute of a Tensor": UserWarning,
    # Inductor recommends them on a GPU; the tolerances of fp32 do not.
    "TensorFloat32 tensor cores": UserWarning,
}


def make_warnings_errors() -> None:
    """Makes warnings errors in this process for good, but `FOREIGN_WARNINGS`; pytest does so in its own."""
    torch.set_warn_always(True)
    warnings.simplefilter("error")
    for message, category in FOREIGN_WARNINGS.items():
        warnings.filterwarnings("ignore", message, category)
