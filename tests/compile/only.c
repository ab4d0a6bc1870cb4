/* Nothing but the implementation: it must bring all that it needs, and leave nothing unused. */
#define CHAOS_IMPLEMENTATION
#include "chaos.h"
