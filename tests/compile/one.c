/* The usual way: the implementation in one file, chaos.h before any other include. */
#define CHAOS_IMPLEMENTATION
#include "chaos.h"
#include "main.h"
