#include "matrix.h"
void fill_avx2(struct isa *isa) { *isa = (struct isa){.name = "avx2", .missing = "not yet"}; }
