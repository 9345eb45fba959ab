"""Every video pipeline that vidaccel patches: tiny, random and offline, with a call that runs it."""
