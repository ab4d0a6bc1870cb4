#define CHAOS_STATIC
#define CHAOS_IMPLEMENTATION
#include "chaos.h"
#include "calls.h"

#ifdef __cplusplus
extern "C"
#endif
    int
    other_file(void);

int main(void) { return calls() || other_file(); }
