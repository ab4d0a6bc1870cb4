/* Two files of one program, each with an implementation of its own (CHAOS_STATIC): no symbol may clash. */
#define CHAOS_STATIC
#define CHAOS_IMPLEMENTATION
#include "chaos.h"
#include "calls.h"

#ifdef __cplusplus
extern "C"
#endif
    int
    other_file(void);

int other_file(void) { return calls(); }
