/* Some other header of the program included chaos.h already. */
#include "chaos.h"
#include "chaos.h"

#define CHAOS_IMPLEMENTATION
#include "chaos.h"
#include "main.h"
