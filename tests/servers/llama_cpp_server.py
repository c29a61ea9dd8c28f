"""Starts llama.cpp's server, in the environment of tests/servers/install.sh: FILE.gguf PORT."""

import sys
import threading

import xllamacpp

print(f"llama.cpp (xllamacpp {xllamacpp.__version__})", flush=True)
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.model_alias = {"judge"}
parameters.hostnames, parameters.port = ["127.0.0.1"], int(sys.argv[2])
parameters.n_ctx, parameters.n_parallel = 8192, 4  # tokens of all requests together
# Keys, values and attention in float32, as here; its defaults are half as long.
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)  # it answers until this process ends
threading.Event().wait()
