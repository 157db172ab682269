"""Which extra of polyprag brings a package, and what is said where one is missing."""

from __future__ import annotations

TORCH_WITHOUT_GPU = "pip install torch --index-url https://download.pytorch.org/whl/cpu"

_BRINGS = {
    "train": "torch transformers accelerate safetensors gguf tokenizers huggingface_hub",
    "serve": "starlette uvicorn anyio pydantic prometheus_client",
    "eval": "ir_measures jinja2 matplotlib",
    "endpoint": "httpx2",
    "corpus": "pyarrow pypdf semantic_text_splitter",
    "datasets": "datasets",
    "langchain": "langchain_core",
    "llama-index": "llama_index",
    "lm-eval": "lm_eval",
}
_EXTRA_OF = {package: extra for extra, packages in _BRINGS.items() for package in packages.split()}


def lacking(what: str, package: str, extra: str) -> ImportError:
    """The error for a kind of input that needs a package which is not installed."""
    return ImportError(f"{what} need {package}: pip install 'polyprag[{extra}]'", name=package)


def remedied(error: ImportError) -> str:
    """What an import lacked, and how to install it."""
    if "pip install" in str(error):
        return str(error)
    package = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF.get(package)
    install = f"pip install 'polyprag[{extra or 'all'}]'"
    if extra is None or not isinstance(error, ModuleNotFoundError):
        return f"{error}; {install} brings what is needed"
    before = f" (without a GPU, before that: {TORCH_WITHOUT_GPU})" if extra == "train" else ""
    return f"the package {package} is not installed: {install}{before}"
