"""SGLang on any CPU (x86 with AVX2 and up, ARM), without builds of sgl-kernel."""
