/* Shuffles that put stored values at the set bits of a mask byte, for instruction sets without an expansion. */
#ifndef LLMSPARSE_EXPAND_TABLE_H
#define LLMSPARSE_EXPAND_TABLE_H

#include <stdint.h>

/* For each mask byte, which byte goes to each place; 0x80 where the shuffle (pshufb, tbl) shall give 0. */
struct expand_table {
    uint8_t bytes[256][8];   /* of 1-byte values */
    uint8_t words[256][16];  /* of 2-byte values */
};

extern struct expand_table expand_table; /* filled when the library is loaded */

#endif
