/* The trigger is still set when some other header includes chaos.h again. */
#define CHAOS_IMPLEMENTATION
#include "chaos.h"
#include "chaos.h"
#undef CHAOS_IMPLEMENTATION
#define CHAOS_IMPLEMENTATION
#include "chaos.h"
#include "main.h"
