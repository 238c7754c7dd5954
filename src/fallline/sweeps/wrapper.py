"""The C++ that torch's compiler writes around its kernels, without what a program of ours never calls.

TorchInductor compiles a program ahead of time into a shared library: kernels, a function that allocates and calls them
one after the other, and some thousand lines that serve programs whose weights are swapped while they run, many threads,
checks of arguments, and names. The compiler spends twice as long on those as on the kernels. A program of ours has no
weights and is called by one thread with what it was made for, so a few lines do: the functions that torch's loader asks
for, and the class that the generated function is a member of.

What the generated text looks like is torch's own affair. Where it is not what is expected here, it is left whole; where
its remainder does not compile, or cannot be loaded, whoever asked for it compiles it again, whole.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

INCLUDES = """
#include <array>
#include <optional>
#include <torch/csrc/inductor/aoti_runtime/device_utils.h>
#include <torch/csrc/inductor/aoti_runtime/utils.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
"""
MODEL = """
namespace torch::aot_inductor {
namespace {
struct AOTInductorModelKernels {};
struct AOTInductorModel {
  int32_t device_type_ = 0;
  int32_t device_idx_ = -1;
  std::unique_ptr<AOTInductorModelKernels> kernels_ = std::make_unique<AOTInductorModelKernels>();
  void run_impl(AtenTensorHandle*, AtenTensorHandle*, DeviceStreamType, AOTIProxyExecutorHandle);
};
[[maybe_unused]] void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}
[[maybe_unused]] bool _check_aoti_runtime_check_inputs_env() { return false; }
}
}
using namespace torch::aot_inductor;
namespace torch::aot_inductor {
"""
RUN = """(void* model, AtenTensorHandle* inputs, size_t, AtenTensorHandle* outputs, size_t, void* stream,
    AOTIProxyExecutorHandle executor) {
  const bool grad = aoti_torch_grad_mode_is_enabled();
  aoti_torch_grad_mode_set_enabled(false);
  int32_t failed = 0;
  try {
    static_cast<AOTInductorModel*>(model)->run_impl(inputs, outputs, static_cast<DeviceStreamType>(stream), executor);
  } catch (const std::exception& error) {
    last_error = error.what();
    failed = 1;
  }
  aoti_torch_grad_mode_set_enabled(grad);
  return failed;
}"""
# By the name of a function of torch's loader, what it does here; all others fail, and nobody calls them.
FUNCTIONS = {
    "AOTInductorModelContainerCreateWithDevice": (
        "(void** model, size_t, const char*, const char*) { *model = new AOTInductorModel(); return 0; }"
    ),
    "AOTInductorModelContainerDelete": "(void* model) { delete static_cast<AOTInductorModel*>(model); return 0; }",
    "AOTInductorModelContainerGetNumConstants": "(void*, size_t* count) { *count = 0; return 0; }",
    "AOTInductorModelContainerRun": RUN,
    "AOTInductorModelContainerRunSingleThreaded": RUN,
    "AOTInductorGetLastError": "(const char** told) { *told = last_error.c_str(); return 0; }",
}
NUMBER_OF_OUTPUTS = "AOTInductorModelContainerGetNumOutputs"
FAILS = "(...) { return 1; }"


def slimmed(text: str) -> str | None:
    """The generated text with only what is called; None where it is not what is expected."""
    names = re.findall(r"^AOTIRuntimeError (AOTInductor\w+)\(", text, re.MULTILINE)
    kernels = re.search(
        r'\n} // extern "C"\n(.*?)namespace torch::aot_inductor {\s*namespace {\s*class AOTInductorModelKernels\b',
        text,
        re.DOTALL,
    )
    sizes = re.search(r": AOTInductorModelBase\(\s*\d+,\s*(\d+),\s*0,", text)  # inputs, outputs, constants
    run = text.find("void AOTInductorModel::run_impl(")
    if not names or kernels is None or sizes is None or run < 0:
        return None
    bodies = {**FUNCTIONS, NUMBER_OF_OUTPUTS: f"(void*, size_t* count) {{ *count = {sizes[1]}; return 0; }}"}
    functions = "\n".join(f"int32_t {name}{bodies.get(name, FAILS)}" for name in dict.fromkeys(names))
    error = "static thread_local std::string last_error;"
    return "\n".join([INCLUDES, kernels[1], MODEL, text[run:], error, 'extern "C" {', functions, "}", ""])


@contextlib.contextmanager
def slim() -> Iterator[None]:
    """Within, torch's compiler makes slim wrappers for processors, and whole ones for all else."""
    from torch._inductor.codecache import AotCodeCompiler

    before = vars(AotCodeCompiler)["compile"]
    compile_text: Any = AotCodeCompiler.compile

    def compiled(graph: Any, text: str, *arguments: Any, **named: Any) -> Any:
        on_a_processor = named.get("device_type") == "cpu"
        return compile_text(graph, (on_a_processor and slimmed(text)) or text, *arguments, **named)

    AotCodeCompiler.compile = compiled  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AotCodeCompiler.compile = before  # type: ignore[method-assign]
