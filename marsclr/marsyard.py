"The place of MarsYard in earlier versions, kept because scripts of users import it from here"
from .archives.marsyard import *
