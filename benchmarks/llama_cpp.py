"""llama.cpp's decoding speed, through the prebuilt package xllamacpp; and GGUF files of other types to give to it."""

from pathlib import Path


def requantised(source: Path, kind: str, out: Path) -> Path:
    """``source`` with its matrices in another type (F16, Q8_0, Q4_0), every other tensor and field as it was."""
    import gguf

    if out.exists():
        return out
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(reader.get_field("general.architecture").contents()))  # type: ignore[union-attr]
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        matrix = len(tensor.shape) == 2
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(
            tensor.name,
            gguf.quants.quantize(data, wanted) if matrix else data,
            raw_dtype=wanted if matrix else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


class LlamaCpp:
    """A server of xllamacpp in this process, on one GGUF file."""

    def __init__(self, file: Path, threads: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel = 512, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.verbosity = -1
        self._server = xllamacpp.Server(parameters)

    def tokens_per_second(self, prompt: str, tokens: int) -> float:
        """Greedy tokens a second after the prompt, by llama.cpp's own clock."""
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return float(self._server.handle_completions(asked)["timings"]["predicted_per_second"])
