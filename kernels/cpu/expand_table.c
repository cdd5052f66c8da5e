/* Shuffles that put stored values at the set bits of a mask byte, for instruction sets without an expansion. */
#include "expand_table.h"

struct expand_table expand_table;

__attribute__((constructor)) static void fill(void)
{
    for (int mask = 0; mask < 256; mask++) {
        uint8_t kept = 0;
        for (int i = 0; i < 8; i++) {
            int set = mask >> i & 1;
            expand_table.bytes[mask][i] = set ? kept : 0x80;
            expand_table.words[mask][2 * i] = set ? 2 * kept : 0x80;
            expand_table.words[mask][2 * i + 1] = set ? 2 * kept + 1 : 0x80;
            kept += (uint8_t)set;
        }
    }
}
